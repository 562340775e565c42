"""The `pipeweaver` command, one file per verb."""
