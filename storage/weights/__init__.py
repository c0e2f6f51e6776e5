"""Weight files that somebody else wrote, as data: nothing in them is run.

torch is needed, and nothing else of `storage` imports this room.
"""
