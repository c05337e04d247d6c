"""Composing: several adapters as one model, merged into one Delta per site or routed to one expert per task."""
