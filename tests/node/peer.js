'use strict';

// The real bee-queue in the role that a test asks for. Each line on stdin is a call, {"id": 1, "call": "save", "args": […]},
// and is answered by a line on stdout, {"id": 1, "result": …} or {"id": 1, "error": "message"}. What the queue and its jobs
// emit is told as {"event": "job succeeded", "args": […]}; a job's own events are told as "own succeeded" with its id first.
// Jobs become objects of their fields, errors {"message": …}. The end of stdin ends the process. Driven by tests/node_peer.py.

const readline = require('node:readline');
const Queue = require('bee-queue');

const QUEUE_EVENTS = [
  'error', 'succeeded', 'retrying', 'failed', 'failed:fatal', 'stalled', 'raised jobs',
  'job succeeded', 'job retrying', 'job failed', 'job progress',
];
const JOB_EVENTS = ['succeeded', 'retrying', 'failed', 'progress'];

let queue;
let release;
const released = new Promise((resolve) => { release = resolve; });

function plain(value) {
  if (value instanceof Error) return {message: value.message};
  if (value === queue) return 'the queue';
  if (Array.isArray(value)) return value.map(plain);
  if (value && value.queue === queue) {
    const {id, data, options, status, progress} = value;
    return {id, data, options, status, progress};
  }
  return value;
}

function write(line) {
  process.stdout.write(JSON.stringify(line) + '\n');
}

function tell(event, ...args) {
  write({event, args: plain(args)});
}

// Its data says what becomes of a job: the same in PythonPeer.
async function handle(job) {
  tell('started', job, Date.now());
  const order = Object(job.data);
  const failures = job.options.stacktraces.length;
  switch (order.do) {
    case 'return':
      return order.value;
    case 'fail':
      throw new Error(order.message);
    case 'fail first':
      if (failures < order.times) throw new Error(`${order.message} ${failures}`);
      return order.value;
    case 'throw':
      throw order.value;
    case 'report':
      for (const step of order.steps) await job.reportProgress(step);
      return order.value;
    case 'hang':
      await released;
      return order.value;
    default:
      return job.data;
  }
}

// A strategy of our own, under the same name in PythonPeer.
function triple(job) {
  const {backoff} = job.options;
  const {delay} = backoff;
  backoff.delay = delay * 3;
  return delay;
}

function makeJob(data, setters) {
  const job = queue.createJob(data);
  for (const [setter, ...args] of setters) job[setter](...args);
  for (const event of JOB_EVENTS) job.on(event, (value) => tell(`own ${event}`, job.id, value));
  return job;
}

// The calls that are not simply a method of the queue.
const calls = {
  async queue(name, url, settings) {
    const redis = url.startsWith('unix:') ? {path: new URL(url).pathname} : url;
    queue = new Queue(name, {redis, ...settings});
    queue.backoffStrategies.set('triple', triple);
    for (const event of QUEUE_EVENTS) queue.on(event, (...args) => tell(event, ...args));
    await queue.ready();
  },
  save(data, setters) {
    return makeJob(data, setters).save();
  },
  async saveAll(orders) {
    const jobs = orders.map(([data, setters]) => makeJob(data, setters));
    const errors = await queue.saveAll(jobs);
    if (errors.size) throw [...errors.values()][0];
    return jobs.map((job) => job.id);
  },
  async retry(id) {
    await (await queue.getJob(id)).retry();
  },
  process(concurrency) {
    queue.process(concurrency, handle);
  },
  release() {
    release();
  },
};

async function answer(line) {
  const {id, call, args} = JSON.parse(line);
  try {
    const result = await (call in calls ? calls[call](...args) : queue[call](...args));
    write({id, result: plain(result)});
  } catch (error) {
    write({id, error: error.message});
  }
}

const lines = readline.createInterface({input: process.stdin});
lines.on('line', answer);
lines.on('close', () => process.exit());
