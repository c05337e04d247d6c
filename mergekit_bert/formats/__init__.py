"""Formats: how models are stored, and what they give to a merge; mbert's file, PEFT folders, Hugging Face folders."""
