"""What is measured into the image: boot, NSM, model, engine, server."""
