"""The OpenAI-compatible server: HTTP in, engine requests out, and nothing that one client does harms another.

http_protocol   a connection: header limits, slow clients, when it was accepted
guard           every route but health: keys, hosts, request ids, the access log
request_body, json_body       bytes to JSON, with limits, strictly
parameters      JSON to a checked request; the table /v1/capabilities shows
service, sampling_fields, answer_form, text_threads      a request to jobs: templates, tokens, grammars
answer, completions, chat, tool_calls      what jobs give to JSON
gateway         admission, fair queue, deadlines, cancellation of jobs
engine_loop     the thread that owns the engine
app, run        routes; start and end of the process
"""
