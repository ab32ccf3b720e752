"""Published models: a run that begins with one, imports to a checkpoint and exports from one."""
