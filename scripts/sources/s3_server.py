"""An S3 service for tests: moto has the objects, and this refuses requests as Amazon S3 does, which moto does not.

    python s3_server.py DIRECTORY PORT      with the Python that has moto and boto3

It verifies each signature with botocore, the signer of boto3: by the keys in DIRECTORY/keys.json, which it reads for each
request, `{ID: {"secret": ..., "token": ..., "ends": SECONDS}}`. Each request is a line of DIRECTORY/access.log. Objects of
the bucket `public` need no signature. DIRECTORY/clock has seconds that its clock is ahead.
"""

import calendar
import json
import re
import sys
import threading
import time
import urllib.parse
from pathlib import Path

from botocore.auth import S3SigV4Auth, S3SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

REGION = "eu-test-1"
# Seconds that the clocks of client and server may differ.
SKEW = 900
STATUS = {"AuthorizationHeaderMalformed": "400 Bad Request", "ExpiredToken": "400 Bad Request"}


class Refused(Exception):
    def __init__(self, code, more=""):
        super().__init__(code)
        self.code, self.more = code, more


def timestamp(text):
    return calendar.timegm(time.strptime(text, "%Y%m%dT%H%M%SZ"))


class Front:
    """Verifies and logs each request, and passes it on to moto."""

    def __init__(self, where, application):
        self.where, self.application, self.lock = where, application, threading.Lock()

    def keys(self, name, token):
        known = json.loads((self.where / "keys.json").read_text()).get(name)
        if known is None:
            raise Refused("InvalidAccessKeyId")
        if token != known.get("token"):
            raise Refused("InvalidToken")
        if time.time() > known.get("ends", float("inf")):
            raise Refused("ExpiredToken")
        return Credentials(name, known["secret"], token)

    def check_time(self, date):
        clock = self.where / "clock"
        ahead = float(clock.read_text()) if clock.exists() else 0
        now = time.time() + ahead
        if abs(timestamp(date) - now) > SKEW:
            raise Refused("RequestTimeTooSkewed")
        return now

    def verify(self, environ, query):
        """The name of the keys that signed the request."""
        headers = {name[5:].replace("_", "-").lower(): value for name, value in environ.items() if name.startswith("HTTP_")}
        url = f"http://{headers['host']}{environ['RAW_URI']}"
        if "X-Amz-Signature" in query:
            return self.verify_url(environ, query, url)
        given = headers.get("authorization")
        if given is None:
            raise Refused("AccessDenied")
        fields = dict(re.findall(r"(Credential|SignedHeaders|Signature)=([^, ]+)", given))
        name, day, region, service, kind = fields["Credential"].split("/")
        if (region, service, kind) != (REGION, "s3", "aws4_request"):
            raise Refused("AuthorizationHeaderMalformed", f"<Region>{REGION}</Region>")
        signed = fields["SignedHeaders"].split(";")
        if "host" not in signed or any(name.startswith("x-amz-") and name not in signed for name in headers):
            raise Refused("AccessDenied")
        self.check_time(headers["x-amz-date"])
        request = AWSRequest(environ["REQUEST_METHOD"], url, headers={name: headers[name] for name in signed})
        request.context["timestamp"] = headers["x-amz-date"]
        if not headers["x-amz-date"].startswith(day):
            raise Refused("SignatureDoesNotMatch")
        auth = S3SigV4Auth(self.keys(name, headers.get("x-amz-security-token")), "s3", REGION)
        text = auth.string_to_sign(request, auth.canonical_request(request))
        if auth.signature(text, request) != fields["Signature"]:
            raise Refused("SignatureDoesNotMatch")
        return name

    def verify_url(self, environ, query, url):
        name = query["X-Amz-Credential"][0].split("/")[0]
        date = query["X-Amz-Date"][0]
        if timestamp(date) + int(query["X-Amz-Expires"][0]) < time.time():
            raise Refused("AccessDenied", "<Message>Request has expired</Message>")
        auth = S3SigV4QueryAuth(self.keys(name, query.get("X-Amz-Security-Token", [None])[0]), "s3", REGION)
        # The signature is of the URL without itself.
        bare = re.sub(r"&X-Amz-Signature=[0-9a-f]+", "", url)
        request = AWSRequest(environ["REQUEST_METHOD"], bare, headers={"host": environ["HTTP_HOST"]})
        request.context["timestamp"] = date
        text = auth.string_to_sign(request, auth.canonical_request(request))
        if auth.signature(text, request) != query["X-Amz-Signature"][0]:
            raise Refused("SignatureDoesNotMatch")
        return name

    def log(self, **line):
        with self.lock, (self.where / "access.log").open("a") as log:
            log.write(json.dumps(line) + "\n")

    def __call__(self, environ, answer):
        query = urllib.parse.parse_qs(environ["QUERY_STRING"], keep_blank_values=True)
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        line = {"method": method, "path": path, "version": query.get("versionId", [None])[0], "keys": None}
        try:
            if not (method == "GET" and path.startswith("/public/")):
                line["keys"] = self.verify(environ, query)
        except Refused as refused:
            text = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{refused.code}</Code>{refused.more}</Error>'
            status = STATUS.get(refused.code, "403 Forbidden")
            self.log(**line, status=int(status[:3]), bytes=0)
            # The connection is usable only when the body of the request was read.
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            answer(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(text)))])
            return [text.encode()]
        seen = {}

        def note(status, headers, *rest):
            seen["status"] = int(status[:3])
            return answer(status, headers, *rest)

        pieces = list(self.application(environ, note))
        self.log(**line, status=seen["status"], bytes=sum(map(len, pieces)))
        return pieces


class Handler(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_request(self, *_):
        pass


def main():
    where, port = Path(sys.argv[1]), int(sys.argv[2])
    front = Front(where, DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", port, front, threaded=True, request_handler=Handler)
    print("ready", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
