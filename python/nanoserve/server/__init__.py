"""The OpenAI-compatible server: HTTP in, engine requests out, and nothing that one client does harms another.

http_protocol   a connection: header limits, slow clients, when it was accepted
guard           every route but health: keys, hosts, request ids, the access log
json_body       bytes to JSON, strictly
parameters      JSON to a checked request; the table /v1/capabilities shows
completions, chat, chat_tools      a request to jobs, and answers to JSON
gateway         admission, fair queue, deadlines, cancellation of jobs
engine_loop     the thread that owns the engine
app, run        routes; start and end of the process
"""
