"""One file per operator: its schema, output shapes, gradient, and the implementation for each device."""
