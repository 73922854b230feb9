"""Which parts of a model go together, and how is it made smaller without them?"""
