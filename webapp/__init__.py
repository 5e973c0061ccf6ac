"""Web applications: the OpenAI-compatible server and the page for rating answers."""
