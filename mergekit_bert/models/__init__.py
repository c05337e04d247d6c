"""Models: adapters, compositions and whole models under one protocol, routing between tasks, and prediction."""
