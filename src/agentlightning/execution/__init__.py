"""How the algorithm and the runners are run: in which processes, watched how, and stopped how."""
