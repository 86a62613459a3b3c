"""Frameworks: Accelerate, Lightning and the Transformers Trainer run the one engine; import the one you use.

Each module needs its framework: `pip install 'flatmin[hf]'` or `'flatmin[lightning]'`.
"""
