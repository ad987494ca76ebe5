"""The trainer: puts agent, algorithm, store and execution strategy together, and shows what they do."""
