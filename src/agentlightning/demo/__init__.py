"""The first experience: a policy learns to play a guessing game, through the whole stack."""
