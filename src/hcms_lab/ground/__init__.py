"""What every room of the laboratory stands on: configuration, errors, records and how they are read."""
