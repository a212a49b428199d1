"""The Hugging Face hub, as far as its official client asks for it: a server on this machine, for slow.py"""
import base64, hashlib, json, re, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

def digest(data):
    return hashlib.sha256(data).hexdigest()

class Repo:
    def __init__(self, files=None):
        self.files = dict(files or {})  # path -> bytes

    @property
    def sha(self):
        said = json.dumps({k: digest(v) for k, v in sorted(self.files.items())})
        return hashlib.sha1(said.encode()).hexdigest()

class Hub:
    """`repos`: (kind, 'org/name') -> `Repo`; `seen`: (method, path) of all requests. `gated`, `cut`: names of
    repositories that ask for consent, and path -> bytes after which a download breaks off, once. `damaged`,
    `fails`: path of a file that comes with another byte, or with HTTP 500, as often as they say, after a cut;
    `read_only`: of the token"""
    def __init__(self):
        self.repos, self.seen, self.gated, self.cut, self.uploads, self.html = {}, [], set(), {}, {}, False
        self.damaged, self.fails, self.read_only = {}, {}, False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = 'HTTP/1.1'

            def log_message(self, *_):
                pass

            def answer(self, status, data=b'', **headers):
                data = json.dumps(data).encode() if isinstance(data, (dict, list)) else data
                self.send_response(status)
                for k, v in (dict(Content_Length=len(data)) | headers).items():
                    self.send_header(k.replace('_', '-'), str(v))
                self.end_headers()
                if self.command != 'HEAD':
                    self.wfile.write(data)

            def handle_any(self):
                body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
                path = unquote(urlsplit(self.path).path)
                hub.seen.append((self.command, path))
                if hub.html:
                    return self.answer(200, b'<html>a proxy says hello</html>', Content_Type='text/html')
                hub.serve(self, path, body)

            do_GET = do_HEAD = do_POST = do_PUT = handle_any

        self.server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f'http://127.0.0.1:{self.server.server_port}'

    def add(self, kind, name, folder=None, **files):
        "A repository of the files of a folder, or of bytes by name"
        found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob('*')
                 if p.is_file()} if folder else {}
        self.repos[kind, name] = Repo(found | files)

    def missing(self, h, kind, name):
        "Answer for a repository that is not there, or not for everybody; None: it is there"
        if (kind, name) not in self.repos:
            return h.answer(404, {}, X_Error_Code='RepoNotFound') or True
        if name in self.gated:
            return h.answer(403, {}, X_Error_Code='GatedRepo') or True

    def serve(self, h, path, body):
        if m := re.fullmatch(r'(?:/(datasets))?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)', path):
            return self.missing(h, m[1] or 'models', m[2]) or self.file(h, self.repos[m[1] or 'models', m[2]],
                                                                        m[4])
        if self.read_only and (path == '/api/repos/create' or '/preupload/' in path or '/commit/' in path):
            return h.answer(403, dict(error='Forbidden: this token may only read'))
        if path == '/api/repos/create':
            said = json.loads(body)
            kind, name = said.get('type', 'model') + 's', f"{said.get('organization') or 'me'}/{said['name']}"
            if (kind, name) not in self.repos:
                repo = self.repos[kind, name] = Repo()
                repo.private = said.get('private') or said.get('visibility') == 'private'
            return h.answer(200, dict(url=f'{self.url}/{name}', name=name))
        if path == '/api/whoami-v2':
            return h.answer(200, dict(name='me', type='user', auth=dict(accessToken=dict(role='write'))))
        if path == '/api/validate-yaml':
            return h.answer(200, dict(errors=[], warnings=[]))
        if m := re.fullmatch(r'/api/(models|datasets)/([^/]+/[^/]+)(?:/(.*))?', path):
            return self.missing(h, m[1], m[2]) or self.api(h, m[1], m[2], m[3] or '', body)
        if m := re.fullmatch(r'(?:/(datasets))?/([^/]+/[^/]+)\.git/info/lfs/objects/batch', path):
            objects = [o | dict(actions=dict(upload=dict(href=f"{self.url}/upload/{o['oid']}")))
                       for o in json.loads(body)['objects']]
            return h.answer(200, dict(objects=objects, transfer='basic'))
        if m := re.fullmatch('/upload/(.+)', path):
            self.uploads[m[1]] = body
            return h.answer(200)
        h.answer(404, {})

    def counted(self, faults, name):
        "Does this request meet a fault? Each counts down"
        faults[name] = faults.get(name, 0) - 1
        return faults[name] >= 0

    def file(self, h, repo, name):
        if name not in repo.files:
            return h.answer(404, {}, X_Error_Code='EntryNotFound', X_Repo_Commit=repo.sha)
        data, first = repo.files[name], 0
        said = dict(ETag=f'"{digest(data)}"', X_Repo_Commit=repo.sha, Accept_Ranges='bytes')
        if m := re.fullmatch(r'bytes=(\d+)-.*', h.headers.get('Range') or ''):
            first = int(m[1])
            said['Content_Range'] = f'bytes {first}-{len(data) - 1}/{len(data)}'
        if h.command == 'GET' and (end := self.cut.pop(name, None)):
            h.send_response(206 if first else 200)
            for k, v in (said | dict(Content_Length=len(data) - first)).items():
                h.send_header(k.replace('_', '-'), str(v))
            h.end_headers()
            h.wfile.write(data[first:end])
            return h.wfile.flush() or h.connection.close()
        if h.command == 'GET' and self.counted(self.fails, name):
            return h.answer(500, dict(error='Internal Server Error'))
        if h.command == 'GET' and self.counted(self.damaged, name):
            data = data[:-1] + bytes([data[-1] ^ 1])
        h.answer(206 if first else 200, data[first:], **said)

    def tree(self, repo, below, deep, folders=False):
        "What lies below a folder: files, and folders unless all files are listed"
        below, out = below and below + '/', {}
        for f, d in sorted(repo.files.items()):
            if f.startswith(below):
                parts = f[len(below):].split('/')
                for i in range(1, len(parts)):
                    if not deep and i == 1 or folders:
                        at = below + '/'.join(parts[:i])
                        out[at] = dict(type='directory', path=at, oid=digest(at.encode())[:40], size=0)
                if deep or len(parts) == 1:
                    out[f] = dict(type='file', path=f, size=len(d), oid=digest(d)[:40])
        return [*out.values()]

    def api(self, h, kind, name, rest, body):
        repo, what = self.repos[kind, name], rest.split('/')[0]
        if what in ('', 'revision'):
            card = re.search('^license: (.+)$', repo.files.get('README.md', b'').decode(), re.M)
            return h.answer(200, dict(id=name, sha=repo.sha, tags=[], cardData=card and dict(license=card[1]) or {},
                                      private=bool(getattr(repo, 'private', False)), downloads=0, likes=0,
                                      siblings=[dict(rfilename=f) for f in repo.files]))
        if what == 'tree':
            found = self.tree(repo, '/'.join(rest.split('/')[2:]), 'recursive=true' in h.path.lower())
            return h.answer(200 if found else 404, found or {}, **({} if found else dict(X_Error_Code='EntryNotFound')))
        if what == 'paths-info':
            names = parse_qs(body.decode()).get('paths', [])
            return h.answer(200, [o for o in self.tree(repo, '', True, folders=True) if o['path'] in names])
        if what == 'preupload':
            files = json.loads(body)['files']
            large = lambda f: f['path'].endswith(('.safetensors', '.npy', '.parquet'))
            return h.answer(200, dict(files=[dict(path=f['path'], uploadMode='lfs' if large(f) else 'regular',
                                                  shouldIgnore=False) for f in files]))
        if what == 'commit':
            for line in body.decode().splitlines():
                o = json.loads(line)
                if o['key'] == 'file':
                    repo.files[o['value']['path']] = base64.b64decode(o['value']['content'])
                if o['key'] == 'lfsFile':
                    repo.files[o['value']['path']] = self.uploads[o['value']['oid']]
            return h.answer(200, dict(commitOid=repo.sha, commitUrl=f'{self.url}/{name}/commit/{repo.sha}'))
        h.answer(404, {})
