"""transformers.generate with PEFT behind the same API, one request after the other: what people write themselves.

    python serve_one_by_one.py PORT BASE DTYPE THREADS NAME=ADAPTER ...

Threads take turns with one lock, as they come; the adapter is switched before each answer. Prints "ready" once it
listens.
"""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, port: int, base: str, dtype: str, adapters: dict[str, str]) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
        for name, folder in adapters.items():
            if isinstance(self.model, PeftModel):
                self.model.load_adapter(folder, adapter_name=name)
            else:
                self.model = PeftModel.from_pretrained(self.model, folder, adapter_name=name)
        self.model.eval()
        self.turn = threading.Lock()
        super().__init__(("127.0.0.1", port), Handler)


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        tokenizer, model = server.tokenizer, server.model
        encoded = tokenizer.apply_chat_template(
            asked["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        answer = []

        def generate() -> None:
            answer.append(
                model.generate(
                    **encoded, max_new_tokens=asked["max_tokens"], do_sample=False, streamer=streamer
                )
            )

        with server.turn:
            if isinstance(model, PeftModel):
                model.set_adapter(asked["model"])
            thread = threading.Thread(target=generate)
            thread.start()
            for text in streamer:
                if text:
                    self.send({"choices": [{"delta": {"content": text}}]})
            thread.join()
        tokens = answer[0].shape[1] - encoded["input_ids"].shape[1]
        self.send({"choices": [], "usage": {"completion_tokens": tokens}})

    def send(self, chunk: dict) -> None:
        self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())

    def log_message(self, *_: object) -> None:
        pass


def main() -> None:
    port, base, dtype, threads, *named = sys.argv[1:]
    torch.set_num_threads(int(threads))
    server = Server(int(port), base, dtype, dict(word.split("=", 1) for word in named))
    print("ready", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
