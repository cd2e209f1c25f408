-- Lists the sessions of a subject, those that ended included unless their ttl told.
--   KEYS[1]  the subject's index
--   ARGV[1]  echo, returned in every reply
-- Returns echo .. the server's time, 16 digits of microseconds since 1970 .. of each session an entry
-- of 32 bytes: when it was started, likewise, and its id.
local index, echo = KEYS[1], ARGV[1]

-- Redis before 5 replicates the script itself unless told to replicate what it wrote, and refuses
-- writes after TIME if it does.
if redis.replicate_commands then redis.replicate_commands() end

local time = redis.call('TIME')
local now = string.format('%010.0f%06.0f', time[1], time[2])
redis.call('ZREMRANGEBYSCORE', index, '-inf', '(' .. string.sub(now, 1, 13))
return echo .. now .. table.concat(redis.call('ZRANGE', index, 0, -1))
