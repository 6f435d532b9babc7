"""The commands of ``python -m fastattn``: one module each, with ``add_arguments(parser)`` and ``main(args) -> exit code``.

``info`` must work where torch or the compiled libraries are broken, so nothing is imported here and
``fastattn/__main__.py`` imports a command only when it is asked for.
"""
