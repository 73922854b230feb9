"""How does a pruned or shrunk model get its accuracy back?"""
