"""A server that speaks as much of the Hub's protocol as models need: repositories, trees, commits, LFS, downloads.

It fails on request: `hub.trouble["commit"] = [503, 429]` makes the next two commits answer so. `hub.requests` has what
was asked, `hub.commits(repo)` how many commits there are.
"""

import base64
import hashlib
import json
import re

from werkzeug import Response

LARGE = (".safetensors", ".so", ".bin")


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def blob_id(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def answer(value, status=200, **headers):
    return Response(json.dumps(value), status, headers, mimetype="application/json")


def refuse(status, code="", **headers):
    return answer({"error": code or str(status)}, status, **{"X-Error-Code": code, "X-Error-Message": code, **headers})


class Hub:
    """Repositories as lists of snapshots, each {path: content}, one list a branch."""

    def __init__(self, httpserver, token="hf_secret"):
        self.url = httpserver.url_for("").rstrip("/")
        # Where large files lie is another host, as on the real Hub: the token must not follow there.
        self.elsewhere = self.url.replace("127.0.0.1", "localhost")
        self.token = token
        self.branches, self.large, self.requests, self.trouble, self.private = {}, {}, [], {}, set()
        httpserver.expect_request(re.compile("/.*")).respond_with_handler(self.respond)

    def commits(self, repo, branch="main"):
        return len(self.branches[repo][branch]) - 1

    def files(self, repo, branch="main"):
        return self.branches[repo][branch][-1]

    @staticmethod
    def commit_id(files):
        return hashlib.sha1(json.dumps({path: sha256(files[path]) for path in sorted(files)}).encode()).hexdigest()

    def respond(self, request):
        self.requests.append(f"{request.method} {request.path}")
        for name, method, pattern in ROUTES:
            match = re.fullmatch(pattern, request.path)
            if not match or request.method.replace("HEAD", "GET") != method:
                continue
            if self.trouble.get(name):
                status = self.trouble[name].pop(0)
                return refuse(status, "trouble", **({"Retry-After": "0"} if status == 429 else {}))
            writes = method != "GET" and name not in ("put", "verify")
            if writes and request.headers.get("Authorization") != f"Bearer {self.token}":
                return refuse(401, "Unauthorized")
            if name in ("put", "blob"):
                assert "Authorization" not in request.headers, "the token went to another host"
            return getattr(self, name)(request, **match.groupdict())
        return refuse(404, f"no route for {request.path}")

    def create(self, request):
        wanted = request.json
        repo = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        known = repo in self.branches
        self.branches.setdefault(repo, {"main": [{}]})
        if wanted.get("private") or wanted.get("visibility") == "private":
            self.private.add(repo)
        return answer({"url": f"{self.url}/{repo}"}, 409 if known else 200)

    def branch(self, request, repo, revision):
        known = revision in self.branches[repo]
        self.branches[repo].setdefault(revision, [self.files(repo)])
        return refuse(409, "exists") if known else answer({})

    def check_card(self, request):
        text = request.json["content"]
        return answer({"errors": [] if text.startswith("---") else [{"message": "no metadata"}], "warnings": []})

    def preupload(self, request, repo, revision):
        if repo not in self.branches:
            return refuse(404, "RepoNotFound")
        listed = [
            {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(LARGE) else "regular", "shouldIgnore": False}
            for f in request.json["files"]
        ]
        return answer({"files": listed})

    def batch(self, request, repo):
        objects = []
        for wanted in json.loads(request.data)["objects"]:
            actions = {"upload": {"href": f"{self.elsewhere}/lfs/{wanted['oid']}"}}
            actions["verify"] = {"href": f"{self.url}/lfs/verify"}
            objects.append({**wanted, **({} if wanted["oid"] in self.large else {"actions": actions})})
        body = json.dumps({"transfer": "basic", "objects": objects})
        return Response(body, mimetype="application/vnd.git-lfs+json")

    def put(self, request, oid):
        content = request.get_data()
        if sha256(content) != oid:
            return refuse(400, "these are other bytes")
        self.large[oid] = content
        return Response("")

    def verify(self, request):
        return answer({}) if len(self.large.get(request.json["oid"], b"")) == request.json["size"] else refuse(404)

    def commit(self, request, repo, revision):
        target = "refs/pr/1" if request.args.get("create_pr") else revision
        files = dict(self.files(repo, revision))
        for line in request.get_data().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.large:
                    return refuse(400, "its bytes are not here")
                files[value["path"]] = self.large[value["oid"]]
        self.branches[repo].setdefault(target, [{}]).append(files)
        made = self.commit_id(files)
        pull = {"pullRequestUrl": f"{self.url}/{repo}/discussions/1"} if target != revision else {}
        return answer({"commitUrl": f"{self.url}/{repo}/commit/{made}", "commitOid": made, "success": True, **pull})

    def _at(self, request, repo, revision):
        """The files of a branch or a commit, or why not."""
        hidden = repo in self.private and request.headers.get("Authorization") != f"Bearer {self.token}"
        if repo not in self.branches or hidden:
            return refuse(401, "RepoNotFound")
        revision = revision.replace("%2F", "/")
        if revision in self.branches[repo]:
            return self.files(repo, revision)
        for snapshots in self.branches[repo].values():
            for files in snapshots:
                if self.commit_id(files) == revision:
                    return files
        return refuse(404, "RevisionNotFound")

    def info(self, request, repo, revision="main"):
        files = self._at(request, repo, revision or "main")
        if isinstance(files, Response):
            return files
        siblings = [{"rfilename": path} for path in sorted(files)]
        return answer({"_id": "1", "id": repo, "modelId": repo, "sha": self.commit_id(files), "private": False,
                       "tags": [], "downloads": 0, "siblings": siblings})  # fmt: skip

    def tree(self, request, repo, revision):
        files = self._at(request, repo, revision)
        if isinstance(files, Response):
            return files
        rows = []
        recursive = request.args.get("recursive", "").lower() == "true"
        for path, content in sorted(files.items()):
            if "/" in path and not recursive:
                continue
            row = {"type": "file", "path": path, "size": len(content), "oid": blob_id(content)}
            if path.endswith(LARGE):
                row["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 134}
            rows.append(row)
        return answer(rows)

    def resolve(self, request, repo, revision, path):
        files = self._at(request, repo, revision)
        if isinstance(files, Response):
            return files
        made = {"X-Repo-Commit": self.commit_id(files)}
        if path not in files:
            return refuse(404, "EntryNotFound", **made)
        content = files[path]
        if path.endswith(LARGE):
            linked = {"X-Linked-Etag": f'"{sha256(content)}"', "X-Linked-Size": str(len(content))}
            self.large[sha256(content)] = content
            return Response("", 302, {**made, **linked, "Location": f"{self.elsewhere}/lfs/{sha256(content)}"})
        return Response(content, 200, {**made, "ETag": f'"{blob_id(content)}"'})

    def blob(self, request, oid):
        return Response(self.large[oid], headers={"ETag": f'"{oid}"'})


NAME, REVISION, OID = r"(?P<repo>[\w.-]+/[\w.-]+)", r"(?P<revision>[^/]+|refs/pr/\d+)", r"(?P<oid>[0-9a-f]{64})"
ROUTES = [
    ("create", "POST", r"/api/repos/create"),
    ("check_card", "POST", r"/api/validate-yaml"),
    ("branch", "POST", rf"/api/models/{NAME}/branch/{REVISION}"),
    ("preupload", "POST", rf"/api/models/{NAME}/preupload/{REVISION}"),
    ("batch", "POST", rf"/{NAME}\.git/info/lfs/objects/batch"),
    ("put", "PUT", rf"/lfs/{OID}"),
    ("verify", "POST", r"/lfs/verify"),
    ("commit", "POST", rf"/api/models/{NAME}/commit/{REVISION}"),
    ("tree", "GET", rf"/api/models/{NAME}/tree/{REVISION}"),
    ("info", "GET", rf"/api/models/{NAME}(?:/revision/{REVISION})?"),
    ("resolve", "GET", rf"/{NAME}/resolve/{REVISION}/(?P<path>.+)"),
    ("blob", "GET", rf"/lfs/{OID}"),
]
