"""A real parent: AWS's nitro-cli run and understood, the host set up for it, and the EC2 instance that is the host."""
