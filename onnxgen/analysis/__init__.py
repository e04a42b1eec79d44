"""Questions about a graph; nothing here changes one."""
