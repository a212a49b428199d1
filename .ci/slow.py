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

def test_deadline():
    "A prediction that must be done at once, one that has a little time, one that has plenty: each file is complete, and the last is that of no deadline"
    sh(*RUN)
    sh(sys.executable, '-c', 'from sdip.playground import make_pairs; make_pairs("world", 0, 0, 60, progress=False)')
    sh('sdip_predict', 'world/images', '--run', 'run', '--out', 'free.csv')
    out = sh('sdip_predict', 'world/images', '--run', 'run', '--out', 'none.csv', '--deadline', 0)
    assert 'time was up' in out and 'answered 0 of 60 pictures' in out and '60 pictures, 60 of them filled' in out
    out = sh('sdip_predict', 'world/images', '--run', 'run', '--out', 'plenty.csv', '--deadline', 60)
    assert 'time was up' not in out and '60 pictures, 0 of them filled' in out
    slow = "import sdip.knn, time; near = sdip.knn.KNNRegressor.predict; sdip.knn.KNNRegressor.predict = lambda self, images: time.sleep(5*len(images)) or near(self, images); " \
           "import sdip.cli; sdip.cli.sdip_predict(['world/images'], 'run', 'slow.csv', deadline=1)"
    start = time.time()
    out = sh(sys.executable, '-c', slow)
    assert 'time was up: knn answered' in out, 'the slow model was to be cut short'
    assert time.time() - start < 280, 'the slow model alone takes 300 s, the deadline was 60'
    for file in ('free', 'none', 'plenty', 'slow'): assert 'good, 60 images' in sh('sdip_submit', 'check', f'{file}.csv', '--images', 'world/images')
    assert float(sh('sdip_submit', 'score', 'plenty.csv', '--truth', 'free.csv').split()[-1]) > 0.999999
    assert float(sh('sdip_submit', 'score', 'slow.csv', '--truth', 'free.csv').split()[-1]) >= float(sh('sdip_submit', 'score', 'none.csv', '--truth', 'free.csv').split()[-1])
