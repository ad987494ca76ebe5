"""The seam that requests leave by, and the wrappers around it that wait, try again and give up."""
