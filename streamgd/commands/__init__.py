"""The commands, one file each: parse, call, print.

Nothing heavy is imported at the top of these modules, so that ``streamgd --help`` answers at once: what a command needs
it imports when it runs. ``parameters`` has the kinds of options, ``signals`` what happens on ctrl-C.
"""
