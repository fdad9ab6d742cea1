"""A command line to runs: request, launch, engines."""
