"""The int8 checkpoint, format version 1: opened, and held against the rules of spec.md."""
