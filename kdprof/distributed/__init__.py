"""One run on many GPUs: a process per GPU, each running the same step on its share of the batch.

Here are the group, its orders and the wrapped modules; never a study, a clock or a record.
"""
