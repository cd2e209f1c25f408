"""The suite: `make test` runs it on memory and on every server found."""
