"""Models that lie on a store: staged there once, copied once to each machine, and used as the folder that they are."""
