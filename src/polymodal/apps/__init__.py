"""What people and programs start: the command line. Thin: parse, call, format."""
