"""A check of all model types of transformers: for which of them does this library have a lens?"""
