"""lorafleet: find out which fine-tuning configuration of a base model to ship."""
