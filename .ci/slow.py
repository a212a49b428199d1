"""What takes too long, or is too rough, for a notebook: whole commands as a person runs them, killed and resumed.

Each function `test_*` runs in a process and an empty current folder of its own; see harness.py."""
import json, os, shutil, subprocess, sys, time, zipfile
from pathlib import Path
from harness import ROOT

def sh(*cmd, status=0, **env):
    "Runs a command to its end and returns what it printed; fails when its exit status is another than `status`"
    done = subprocess.run([str(o) for o in cmd], env={**os.environ, **env}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print('$', *cmd, done.stdout, sep=' ')
    assert done.returncode == status, f'exit status {done.returncode}, expected {status}'
    return done.stdout

def wait_for(condition, limit=300):
    "Waits until `condition()` is true"
    end = time.time() + limit
    while not condition():
        assert time.time() < end, f'waited {limit} s in vain'
        time.sleep(.05)

def test_wheel_holds_the_library():
    "The wheel is pure Python, and its commands import from inside the zip, as Kaggle does with it"
    shutil.copytree(ROOT, 'clone', symlinks=True, ignore=shutil.ignore_patterns('.git', 'build', 'runs', '_proc', '_docs', '*.egg-info'))
    sh(sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--no-build-isolation', '-w', 'dist', './clone')
    [wheel] = Path('dist').glob('sdip-*-py3-none-any.whl')
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT/'sdip').rglob('*.py')}
    assert modules <= set(zipfile.ZipFile(wheel).namelist()), 'the wheel lacks modules'
    out = sh(sys.executable, '-c', 'import sdip.cli; print(sdip.cli.__file__)', PYTHONPATH=str(wheel.resolve()))
    assert '.whl' in out, f'sdip was imported from {out}'

def test_generate():
    "One picture from a prompt; then a data set, killed at its start and finished by the same command again"
    sh('sdip_generate', 'owl.png', '--prompt', 'a white owl at night, 8k')
    assert Path('owl.png').read_bytes()[:4] == b'\x89PNG'
    assert 'no known subject' in sh('sdip_generate', 'x.png', '--prompt', 'nothing at all', status=1) and not Path('x.png').exists()
    command = 'sdip_generate', 'world', '--n', 300
    first = subprocess.Popen([str(o) for o in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: len(list(Path('world').glob('images/[!.]*.png'))) > 20)
    first.kill()
    first.wait()
    assert not Path('world/pairs.parquet').exists(), 'it was done before it could be killed'
    kept = {p: p.stat().st_mtime_ns for p in Path('world').glob('images/[!.]*.png')}
    sh(*command)
    assert Path('world/pairs.parquet').exists() and len(list(Path('world').glob('images/[!.]*.png'))) == 600 + 30 + 60
    assert all(p.stat().st_mtime_ns == t for p, t in kept.items()), 'pictures that were complete were drawn again'

def test_dedup():
    "A table with an exact duplicate and an empty prompt comes out with each distinct prompt once"
    Path('prompts.csv').write_text('prompt,likes\na red cat on a beach,3\nA red cat on a  beach,4\na blue robot in a forest,1\n,2\n')
    sh('sdip_dedup', 'prompts.csv', '--out', 'kept.csv', '--dropped', 'gone.csv')
    assert Path('kept.csv').read_text() == 'prompt,likes\na red cat on a beach,3\na blue robot in a forest,1\n'
    assert len(Path('gone.csv').read_text().splitlines()) == 3
    assert 'x.txt is neither .csv nor .parquet' in sh('sdip_dedup', 'prompts.csv', '--out', 'x.txt', status=1)

RUN = 'sdip_run', '--preset', 'tiny', '--out', 'run'

def scores(): return json.loads(Path('run/scores.json').read_text())['test']

def stopped_at(line):
    "Starts the run, kills it as soon as it has printed `line`, and returns the receipts that stand by then"
    out = Path('log.txt')
    with out.open('w') as f: first = subprocess.Popen(RUN, stdout=f, stderr=subprocess.STDOUT)
    wait_for(lambda: line in out.read_text())
    first.kill()
    first.wait()
    return {p: p.stat().st_mtime_ns for p in Path('run/receipts').glob('*.json')}

def test_run_killed_at_three_stages():
    "Killed while it draws, while it trains and while it blends, a run does only what is missing, and ends with the same scores"
    sh(*RUN)
    whole = scores()
    shutil.rmtree('run')
    done = 0
    for line in 'MiniLM embeddings of the prompts ...', 'CLIP regressor ...', 'Ensemble ...':
        kept = stopped_at(line)
        assert len(kept) > done, f'nothing was done between two kills: {kept}'
        done = len(kept)
        assert not Path('run/scores.json').exists()
    out = sh(*RUN)
    assert all(p.stat().st_mtime_ns == t for p, t in kept.items()), 'a finished stage was done again'
    assert out.count('done before') == len(kept)
    assert not list(Path('run').rglob('.tmp-*')), 'what the killed runs left half-written is still there'
    for name, score in whole.items(): assert abs(scores()[name] - score) < 1e-4, (name, score, scores()[name])
    assert sh(*RUN).count('done before') == len(list(Path('run/receipts').glob('*.json')))
    assert 'seed: the folder has 0, this call says 1' in sh(*RUN, '--seed', 1, status=1)

def test_predict():
    "A folder with good pictures, a broken one and a text file; then places that cannot be used, each with a reason"
    sh(*RUN)
    Path('in').mkdir()
    for i, prompt in enumerate(('a red cat', 'two blue boats at night')): sh('sdip_generate', f'in/{i}.png', '--prompt', prompt)
    Path('in/broken.jpg').write_bytes(Path('in/0.png').read_bytes()[:200])
    Path('in/notes.txt').write_text('not a picture')
    out = sh('sdip_predict', 'in', '--run', 'run', '--out', 'submission.csv')
    assert 'broken.jpg' in out and '3 pictures, 1 of them filled' in out and 'know nothing of real pictures' in out
    assert 'good, 3 images' in sh('sdip_submit', 'check', 'submission.csv', '--images', 'in')
    shutil.copy('submission.csv', 'truth.csv')
    assert 'score 1.0000' in sh('sdip_predict', 'in', '--run', 'run', '--out', 'again.csv', '--truth', 'truth.csv')
    Path('empty').mkdir()
    for command, reason in ((('empty', '--run', 'run'), 'empty'), (('in', '--run', 'nowhere'), 'holds neither'),
                            (('in', '--run', 'run', '--out', 'in/notes.txt/x.csv'), 'cannot write')):
        assert reason in sh('sdip_predict', *command, status=1)

ENCODE = """import sys
from sdip.encoders import TargetEncoder, encode
from sdip.playground import sample_prompts
prompts = sample_prompts(240)
out, i, n = sys.argv[1], *map(int, sys.argv[2:])
encode(prompts + prompts[::3], TargetEncoder(device='cpu'), out, shard_size=16, shard=(i, n) if n > 1 else None)
"""

def test_encode_by_three_processes():
    "Three processes at once in one folder, one of them killed and started again, leave the bytes that one process leaves"
    Path('job.py').write_text(ENCODE)
    start = lambda *args: subprocess.Popen([sys.executable, 'job.py', *map(str, args)])
    sh(sys.executable, 'job.py', 'one', 0, 1)
    jobs = [start('three', i, 3) for i in range(3)]
    wait_for(lambda: len(list(Path('three').glob('shard-*.npy'))) > 2)
    jobs[0].kill()
    for job in jobs: job.wait()
    kept = {p: p.stat().st_mtime_ns for p in Path('three').glob('shard-*.npy')}
    assert start('three', 0, 3).wait() == 0
    assert all(p.stat().st_mtime_ns == t for p, t in kept.items()), 'shards that were complete were made again'
    sh(sys.executable, 'job.py', 'three', 0, 1)
    assert Path('three/emb.npy').read_bytes() == Path('one/emb.npy').read_bytes(), 'three processes made other bytes than one'
    assert not list(Path('three').glob('shard-*')), 'shards are left over'
