"""A double of SQL Server that the real driver talks to over the real wire.

There is no SQL Server where this suite runs. What stands here speaks TDS 7.4 as the driver of the
SQL Server sink speaks it, parses every byte the driver sends, keeps tables in memory, and can cut
a connection at any byte of any message, either way.

**What it proves**: that the driver connects, sends the sink's statements in the right order and
with the right values, that the stream of a bulk load holds every value exactly, that every fault
is classified rightly (retry, look up, pause, refuse), and that recovery asks the right questions
in the right order.

**What it cannot prove**: that a real server takes these statements. It understands the shapes of
the sink's own statements and no T-SQL; it keeps what was sent and knows nothing of a server's
types, collations, plans and limits; its locks are a table each. For those there is the contract
suite against a real server, named by the environment.

    packets.py     messages cut into packets, and the line that can be severed
    values.py      SQL types and their values, as bytes both ways
    requests.py    what the driver sends: login, batch, procedure call, transaction, bulk rows
    tokens.py      what a server answers
    tables.py      tables, transactions and locks in memory
    statements.py  the statements it understands, recognised by their shape
    server.py      the listener, and a conversation with one connection
    faults.py      plans of what goes wrong, and the log of what was said

The sections of [MS-TDS] that a module implements are named in it.
"""
