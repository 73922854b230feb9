"""Which stages make a model, and which models are good enough?"""
