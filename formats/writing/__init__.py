"""An int8 checkpoint being written: its shards, its journal, its commit."""
