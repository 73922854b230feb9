"""Which of all the ways to run this model on this machine is the best?"""
