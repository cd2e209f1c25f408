-- Lists the sessions of a subject, those that ended included unless their ttl told.
--   KEYS[1]  the subject's index
--   ARGV[1]  echo, behind every reply
-- Returns the server's time, 16 digits of microseconds since 1970 .. of each session an entry of 32
-- bytes: when it was started, likewise, and its id .. echo.
local index, echo = KEYS[1], ARGV[1]

-- Redis before 5 replicates the script itself unless told to replicate what it wrote, and refuses
-- writes after TIME if it does.
if redis.replicate_commands then redis.replicate_commands() end

local time = redis.call('TIME')
local now = string.format('%010.0f%06.0f', time[1], time[2])
local left = redis.call('ZCARD', index)
left = left - redis.call('ZREMRANGEBYSCORE', index, '-inf', '(' .. string.sub(now, 1, 13))
-- If there is none left, it is gone, and in a slot that moves what is gone cannot be asked again.
return now .. table.concat(left > 0 and redis.call('ZRANGE', index, 0, -1) or {}) .. echo
