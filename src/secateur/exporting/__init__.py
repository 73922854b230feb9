"""How does a model get into another engine?"""
