-- Makes a write that changes nothing, so that a WAIT behind it waits for all that was written before:
-- one behind a script that wrote nothing itself may not wait at all (Redis 7.2 and later, Valkey).
--   KEYS[1]  a session's hash or an index, which need not be there
--   ARGV[1]  by what to know that this server has what was written: the session's fingerprint; 'gone'
--            if there must be no session; or '' not to look
--   ARGV[2]  echo, behind every reply
-- Returns '1', or '0' if it has not, .. echo.
local key, echo, sign = KEYS[1], ARGV[2], ARGV[1]

-- Redis before 5 replicates the script itself unless told to replicate what it wrote, and refuses
-- writes after TIME if it does.
if redis.replicate_commands then redis.replicate_commands() end

-- In this order its end may come to be a millisecond earlier, if the clock goes on, but never later.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local left, written, has = redis.call('PTTL', key), nil, true
if sign ~= '' then
  local own = redis.call('HGET', key, 'fp')
  has = own and string.sub(own, 1, 16) == sign or not own and sign == 'gone'
end
if left >= 0 then
  written = redis.pcall('PEXPIREAT', key, string.format('%.0f', now + left))
elseif left == -2 then
  -- A full server refuses what takes memory only if it is a script's first write.
  written = redis.pcall('HDEL', key, 'mark')
end
if type(written) == 'table' then return redis.error_reply(written.err .. ' ' .. echo) end
if left == -2 then
  redis.call('HSET', key, 'mark', '')
  redis.call('UNLINK', key)
end
return (has and '1' or '0') .. echo
