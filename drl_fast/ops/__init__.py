"""One file an operator: its schema, its shapes, its gradient, and which implementation each device gets."""
