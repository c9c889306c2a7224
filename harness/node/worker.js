'use strict';

// worker.py with the real bee-queue: takes jobs from the queue and returns each one's data as its result.

const Queue = require('bee-queue');
const settings = require('./settings');

const queue = new Queue(settings.queueName, {
  redis: settings.redis,
  isWorker: true,
  activateDelayedJobs: true,
  getEvents: false,
  sendEvents: true,
  storeJobs: false,
  removeOnSuccess: true,
  removeOnFailure: true,
});

queue.on('ready', () => console.error(`worker: connected; concurrency ${settings.concurrency}`));
queue.on('error', (error) => console.error(`worker: ${error.message}`));
queue.process(settings.concurrency, async (job) => ({data: job.data}));

async function stop() {
  await queue.close();
  process.exit(0);
}

process.on('SIGTERM', stop);
process.on('SIGINT', stop);
