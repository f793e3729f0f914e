"""What a relying party must trust: Evidence -> Claims -> Verdict, and the measurements it is held against."""
