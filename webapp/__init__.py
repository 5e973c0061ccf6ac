"""Web applications: the OpenAI-compatible server and the page for rating answers.

Both are for one user on this machine. `guard` limits what any client can send or hold,
`local` keeps other users and other sites out, `openai` and `rate` are the applications.
The commands `serve` and `rate` open the socket, create the token and run them.
"""
