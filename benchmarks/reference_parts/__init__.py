"""What `reference.py` is made of: the plan, the processes that work, and one file for each part."""
