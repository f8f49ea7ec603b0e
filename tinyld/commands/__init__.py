"""A module a verb: resolve, load, call the library, write the run folder, print the result.

torch comes in through the functions, so that `tinyld --help`, `info` and `tasks` need none.
"""
