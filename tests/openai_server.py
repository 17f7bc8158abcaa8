"""An OpenAI-compatible server over the tiny vision-language model, as a process of its own, that can misbehave.

    python -m tests.openai_server FOLDER [--faults N]

makes the model in FOLDER, prints its address in one line when it is ready, and ends when its standard input does. Every N-th request of a
completion fails in turn with "429 Too Many Requests", "500 Internal Server Error" and a dropped connection. GET /stats
says how many requests there were and how many at once.
"""

import argparse
import base64
import io
import itertools
import json
import os
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
import xgrammar
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig
from xgrammar.contrib.hf import LogitsProcessor

from tests.tiny_vlm import make_vlm

MODEL = "tiny-vlm"


class Server(ThreadingHTTPServer):
    """Loads the model and counts."""

    daemon_threads = True

    def __init__(self, folder: Path, faults: int) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        make_vlm(folder)
        torch.set_num_threads(1)
        self.processor = AutoProcessor.from_pretrained(folder)
        self.model = AutoModelForImageTextToText.from_pretrained(folder).eval()
        tokenizer = self.processor.tokenizer
        self.model.generation_config = GenerationConfig(
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
        )
        size = self.model.config.text_config.vocab_size
        self.compiler = xgrammar.GrammarCompiler(
            xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=size, stop_token_ids=tokenizer.eos_token_id)
        )
        self.one_at_a_time = threading.Lock()
        self.counting = threading.Lock()
        self.every, self.kinds = faults, itertools.cycle(["429", "500", "drop"])
        self.stats = {"requests": 0, "answers": 0, "faults": 0, "in_flight": 0, "max_in_flight": 0}

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client that was killed is none of our errors
            super().handle_error(request, client_address)

    def count(self, **changes: int) -> None:
        with self.counting:
            for key, change in changes.items():
                self.stats[key] += change
            self.stats["max_in_flight"] = max(self.stats["max_in_flight"], self.stats["in_flight"])

    def fault(self) -> str | None:
        """How this request has to fail, if it has to."""
        with self.counting:
            self.stats["requests"] += 1
            if not self.every or self.stats["requests"] % self.every:
                return None
            self.stats["faults"] += 1
            return next(self.kinds)

    @torch.inference_mode()
    def complete(self, request: dict) -> tuple[str, str]:
        """Text and finish reason of an answer."""
        images, messages = [], []
        for message in request["messages"]:
            parts = message["content"]
            if not isinstance(parts, str):
                for part in parts:
                    if part["type"] == "image_url":
                        data = part["image_url"]["url"].removeprefix("data:image/jpeg;base64,")
                        images.append(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))
                        part["type"] = "image"
            messages.append({"role": message["role"], "content": parts})
        text = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        inputs = self.processor(text=[text], images=images, return_tensors="pt")
        if "structured_outputs" in request:
            grammar = self.compiler.compile_grammar(request["structured_outputs"]["grammar"])
        else:
            schema = request["response_format"]["json_schema"]["schema"]
            grammar = self.compiler.compile_json_schema(json.dumps(schema), any_whitespace=False)
        with self.one_at_a_time:
            torch.manual_seed(request["seed"])
            tokens = self.model.generate(
                **inputs,
                logits_processor=[LogitsProcessor(grammar)],
                do_sample=True,
                temperature=request["temperature"],
                max_new_tokens=1000,
            )[0, inputs["input_ids"].shape[1] :]
        finished = tokens[-1].item() == self.processor.tokenizer.eos_token_id
        return self.processor.tokenizer.decode(tokens, skip_special_tokens=True), "stop" if finished else "length"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self.reply(
                200, {"object": "list", "data": [{"id": MODEL, "object": "model", "created": 0, "owned_by": ""}]}
            )
        elif self.path == "/stats":
            self.reply(200, self.server.stats)
        else:
            self.reply(404, {"error": {"message": f"no {self.path} here"}})

    def do_POST(self) -> None:
        self.server.count(in_flight=1)
        try:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            fault = self.server.fault()
            if fault == "drop":
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
            elif fault:
                self.reply(int(fault), {"error": {"message": "not now"}})
            elif self.path != "/v1/chat/completions":
                self.reply(404, {"error": {"message": f"no {self.path} here"}})
            else:
                text, reason = self.server.complete(request)
                self.server.count(answers=1)
                message = {"role": "assistant", "content": text}
                choice = {"index": 0, "message": message, "finish_reason": reason}
                answer = {"id": "0", "object": "chat.completion", "created": 0, "model": MODEL, "choices": [choice]}
                self.reply(200, answer)
        finally:
            self.server.count(in_flight=-1)

    def reply(self, status: int, body: dict) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if status in (429, 500):
            self.send_header("retry-after-ms", "20")  # tests are in a hurry
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_) -> None:
        pass


def end_with_parent() -> None:
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--faults", type=int, default=0)
    arguments = parser.parse_args()
    server = Server(arguments.folder, arguments.faults)
    threading.Thread(target=end_with_parent, daemon=True).start()
    sys.stdout.write(f"http://127.0.0.1:{server.server_port}\n")
    sys.stdout.flush()
    server.serve_forever()
