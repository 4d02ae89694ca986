"""The parser, its messages, the table of commands, and the classes of one's own that a command is for."""
