"""Training: recipes, models, data, the run behind `moe-kit train`, and the trainer for policy routers.

Importing this package loads nothing heavy; torch and transformers are imported where they are used.
"""
