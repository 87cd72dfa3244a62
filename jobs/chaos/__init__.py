"""A campaign of faults against real runs: `farseer chaos`."""
